#!/bin/bash
# All the paper's iterations on a few hours of sound with the tiny model: 1 -> 2 -> 3, and 3+ (a fine-tuned iteration 2 teaches).
# The same command again goes on where it was interrupted: finished stages are kept, a half-done one is resumed.
# Usage: runs/iterations.sh packs/a,packs/b packs/labelled [fold]     (a labelled pack without folds has train and test)
# Environment: OUT, and the flags of each kind of stage: MAM, TOKENIZER, FINETUNE, e.g. MAM="--batch_seconds 82 --max_steps 1000 --warmup_steps 100"
set -e
DATA=$1 LABELLED=$2 FOLD=$3 OUT=${OUT:-out}
MAM=${MAM:---batch_seconds 82 --max_steps 4000 --warmup_steps 400}
TOKENIZER=${TOKENIZER:---max_steps 800}
FINETUNE=${FINETUNE:---max_steps 1000}
TEACHER=$OUT/finetune_teacher${FOLD:+_fold$FOLD}.pt

finished() {    # has this checkpoint seen its last step?
    [ -e $1 ] && python -c "import sys, torch; c = torch.load(sys.argv[1], 'cpu', weights_only=True); sys.exit(c['step'] < c['config']['max_steps'])" $1
}
stage() {       # stage CHECKPOINT SCRIPT FLAG...
    local checkpoint=$1 resume=; shift
    if finished $checkpoint; then echo "$checkpoint is finished"; return; fi
    if [ -e $checkpoint ]; then resume=--resume; fi
    echo "+ python $* $resume"
    python "$@" $resume
    finished $checkpoint || { echo "$checkpoint is not finished; the same command goes on from there"; exit 1; }
}

stage $OUT/mam_iter1.pt train_mam.py --iter 1 --data $DATA --out_dir $OUT $MAM
for K in 2 3; do
    stage $OUT/tokenizer_iter$K.pt train_tokenizer.py --iter $K --data $DATA --out_dir $OUT $TOKENIZER
    stage $OUT/mam_iter$K.pt train_mam.py --iter $K --data $DATA --out_dir $OUT $MAM
done
# 3+: the encoder of iteration 2 learns the classes of the training clips, its logits teach the tokenizer
stage $TEACHER finetune.py --data $LABELLED ${FOLD:+--fold $FOLD} --init $OUT/mam_iter2.pt --name teacher --out_dir $OUT $FINETUNE
stage $OUT/plus/tokenizer_iter3.pt train_tokenizer.py --iter 3 --teacher $TEACHER --data $DATA --out_dir $OUT/plus $TOKENIZER
stage $OUT/plus/mam_iter3.pt train_mam.py --iter 3 --data $DATA --out_dir $OUT/plus $MAM

# what came of it, on clips that nothing was trained on
TOKENIZERS="$OUT/tokenizer_iter1.pt kmeans $OUT/tokenizer_iter2.pt $OUT/tokenizer_iter3.pt $OUT/plus/tokenizer_iter3.pt"
if [ ! -e $OUT/report.json ]; then
    python report.py $TOKENIZERS --data $LABELLED --split ${FOLD:-test} --json $OUT/report.json
fi
for INIT in scratch $OUT/mam_iter1.pt $OUT/mam_iter2.pt $OUT/mam_iter3.pt $OUT/plus/mam_iter3.pt; do
    echo "+ frozen probe of $INIT"
    python finetune.py --data $LABELLED --init $INIT ${FOLD:+--fold $FOLD} --freeze
done
