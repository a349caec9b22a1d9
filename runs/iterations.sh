#!/bin/bash
# The paper's iterations on a few hours of sound with the tiny model: 1 -> 2 -> 3, and 3+, where the
# fine-tuned iteration 2 teaches. Then what came of it on clips that nothing was trained on: each encoder
# frozen and fine-tuned, and a report on the tokenizers.
#
#     runs/iterations.sh packs/a,packs/b packs/labelled [fold]    # without folds: the splits train and test
#
# The same command again goes on where it was interrupted: finished stages are kept, a half-done one resumed.
# Environment: LAST=2 ends after iteration 2; OUT; the flags of each kind of stage, MAM, TOKENIZER, FINETUNE.
#
# Measured (LOG.md, 3 seeds): ESC-50 fold 5 fine-tuned 54.1 % from iteration 1, 55.9 % from iteration 2;
# frozen 49.3 and 52.2 %. Some 40 minutes for LAST=2 on one core where bfloat16 is fast. With 1,000 steps
# of MAM iteration 2 does not pay yet.
set -e
DATA=$1 LABELLED=$2 FOLD=$3
OUT=${OUT:-out}
LAST=${LAST:-3}
MAM=${MAM:---batch_seconds 82 --max_steps 4000 --warmup_steps 400}
TOKENIZER=${TOKENIZER:---max_steps 800}
FINETUNE=${FINETUNE:---max_steps 1000}
TEACHER=$OUT/finetune_mam_iter2${FOLD:+_fold$FOLD}.pt

# has this checkpoint seen its last step?
finished() {
    [ -e $1 ] && python - $1 <<'END'
import sys
from common import read_checkpoint
ckpt = read_checkpoint(sys.argv[1])
sys.exit(ckpt["step"] < ckpt["config"]["max_steps"])
END
}

# stage CHECKPOINT SCRIPT FLAG...: run a script unless it is done, and go on where it was interrupted
stage() {
    local checkpoint=$1 resume=
    shift
    if finished $checkpoint; then
        echo "$checkpoint is finished"
        return
    fi
    if [ -e $checkpoint ]; then resume=--resume; fi
    echo "+ python $* $resume"
    python "$@" $resume
    if ! finished $checkpoint; then
        echo "$checkpoint is not finished; the same command goes on from there"
        exit 1
    fi
}

# finetune CHECKPOINT NAME INIT
finetune() {
    stage $1 finetune.py --data $LABELLED ${FOLD:+--fold $FOLD} --init $3 --name $2 --out_dir $OUT $FINETUNE
}

# iterations
stage $OUT/mam_iter1.pt train_mam.py --iter 1 --data $DATA --out_dir $OUT $MAM
ENCODERS=$OUT/mam_iter1.pt
TOKENIZERS="$OUT/tokenizer_iter1.pt kmeans"
for K in $(seq 2 $LAST); do
    stage $OUT/tokenizer_iter$K.pt train_tokenizer.py --iter $K --data $DATA --out_dir $OUT $TOKENIZER
    stage $OUT/mam_iter$K.pt train_mam.py --iter $K --data $DATA --out_dir $OUT $MAM
    ENCODERS="$ENCODERS $OUT/mam_iter$K.pt"
    TOKENIZERS="$TOKENIZERS $OUT/tokenizer_iter$K.pt"
done

# 3+: the encoder of iteration 2 learns the classes of the training clips, and its logits teach the tokenizer
if [ $LAST -ge 3 ]; then
    finetune $TEACHER mam_iter2 $OUT/mam_iter2.pt
    stage $OUT/plus/tokenizer_iter3.pt train_tokenizer.py --iter 3 --teacher $TEACHER --data $DATA \
        --out_dir $OUT/plus $TOKENIZER
    stage $OUT/plus/mam_iter3.pt train_mam.py --iter 3 --data $DATA --out_dir $OUT/plus $MAM
    ENCODERS="$ENCODERS $OUT/plus/mam_iter3.pt"
    TOKENIZERS="$TOKENIZERS $OUT/plus/tokenizer_iter3.pt"
fi

# what came of it
if [ ! -e $OUT/report.json ]; then
    python -m tools.report $TOKENIZERS --data $LABELLED --split ${FOLD:-test} --json $OUT/report.json
fi
for INIT in scratch $ENCODERS; do
    NAME=$(basename ${INIT/plus\/mam_iter3/mam_iter3plus} .pt)
    finetune $OUT/finetune_$NAME${FOLD:+_fold$FOLD}.pt $NAME $INIT
    echo "+ frozen probe of $INIT"
    python evaluate.py --data $LABELLED ${FOLD:+--fold $FOLD} --init $INIT --probe linear \
        --name $NAME --out_dir $OUT
done
