#!/bin/bash
# The paper's whole loop at base size (section 4.2): iterations 1 -> 2 -> 3, and 3+, whose tokenizer learns
# the class logits of the fine-tuned iteration 2; each fine-tuned on AudioSet 2M, as in Table 2. The pack has
# the splits train and test, and nothing is trained on test.
#
#     runs/paper_base.sh packs/audioset           # on 8 GPUs; the environment that it heeds: stages.sh
#
# Batches, steps and rates are those of Table 4. On 8 GPUs a rank's share goes through in one part: 700 s in
# pre-training, 800 s in fine-tuning, some 11 and 22 GB as counted. Not run yet: it needs AudioSet and GPUs.
GPUS=${GPUS:-8}
. runs/stages.sh
DATA=${1:?usage: runs/paper_base.sh packs/audioset}
COMMON="--data $DATA --workers 4 --compile --log_every 100"
CADENCE="--eval_every 5000 --save_every 5000 --keep_every 50000"

# mam FOLDER ITERATION FLAG...
mam() {
    local out=$1 iteration=$2
    shift 2
    stage $out/mam_iter$iteration.pt train_mam.py --iter $iteration --out_dir $out $COMMON $CADENCE \
        --model base --crop_seconds 0 --batch_seconds 5600 --device_seconds 700 \
        --max_steps 400000 --warmup_steps 32000 --lr 5e-4 --weight_decay 0.01 "$@" $MAM
}

# tokenizer FOLDER ITERATION PRESET TEACHER
tokenizer() {
    stage $1/tokenizer_iter$2.pt train_tokenizer.py --iter $2 --out_dir $1 $COMMON $CADENCE --preset $3 \
        --teacher $4 --device_seconds 700 $TOKENIZER
}

# finetune NAME INIT
finetune() {
    stage $OUT/finetune_$1.pt finetune.py --task as2m --init $2 --name $1 --out_dir $OUT $COMMON \
        --device_seconds 800 $FINETUNE
}

# iterations, each with the codes of a tokenizer whose teacher is the one before
mam $OUT 1 --projection plain
finetune mam_iter1 $OUT/mam_iter1.pt
for K in 2 3; do
    tokenizer $OUT $K ssl $OUT/mam_iter$((K - 1)).pt
    mam $OUT $K
    finetune mam_iter$K $OUT/mam_iter$K.pt
done

# 3+
tokenizer $OUT/plus 3 sl $OUT/finetune_mam_iter2.pt
mam $OUT/plus 3
finetune mam_iter3plus $OUT/plus/mam_iter3.pt
