#!/bin/bash
# The paper's iterations on a few hours of sound with the tiny model: 1 -> 2 -> 3, and 3+, where the
# fine-tuned iteration 2 teaches. Then what came of it on clips that nothing was trained on: each encoder
# frozen and fine-tuned, and a report on the tokenizers.
#
#     runs/iterations.sh packs/a,packs/b packs/labelled [fold]    # without folds: the splits train and test
#
# With a fold, pre-training and tokenizers do not hear it either. LAST=2 ends after iteration 2. What else the
# environment says, and how the same command goes on where it was interrupted: stages.sh.
#
# Measured (LOG.md, 3 seeds): ESC-50 fold 5 fine-tuned 54.1 % from iteration 1, 55.9 % from iteration 2;
# frozen 49.3 and 52.2 %. Some 40 minutes for LAST=2 on one core where bfloat16 is fast. With 1,000 steps
# of MAM iteration 2 does not pay yet.
. runs/stages.sh
USAGE="usage: runs/iterations.sh packs/a,packs/b packs/labelled [fold]"
DATA=$1 LABELLED=${2:?$USAGE} FOLD=$3
LAST=${LAST:-3}

# the fold is left out of those packs that have it
has_fold() {
    python - "$DATA" "$FOLD" <<'END'
import csv
import sys

data, fold = sys.argv[1:]
splits = set()
for pack in data.split(","):
    with open(f"{pack.partition(':')[0]}/clips.csv") as file:
        splits.update(row["split"] for row in csv.DictReader(file))
sys.exit(fold not in splits)
END
}
HEARD="--data $DATA"
if [ -n "$FOLD" ] && has_fold; then HEARD="$HEARD --leave_out $FOLD"; fi
MAM="$HEARD --batch_seconds 82 --max_steps 4000 --warmup_steps 400 $MAM"
TOKENIZER="$HEARD --max_steps 800 $TOKENIZER"
TEACHER=$OUT/finetune_mam_iter2${FOLD:+_fold$FOLD}.pt

# finetune CHECKPOINT NAME INIT
finetune() {
    stage $1 finetune.py --data $LABELLED ${FOLD:+--fold $FOLD} --init $3 --name $2 --out_dir $OUT \
        --max_steps 1000 $FINETUNE
}

# iterations
stage $OUT/mam_iter1.pt train_mam.py --iter 1 --out_dir $OUT $MAM
ENCODERS=$OUT/mam_iter1.pt
TOKENIZERS="$OUT/tokenizer_iter1.pt kmeans"
for K in $(seq 2 $LAST); do
    stage $OUT/tokenizer_iter$K.pt train_tokenizer.py --iter $K --out_dir $OUT $TOKENIZER
    stage $OUT/mam_iter$K.pt train_mam.py --iter $K --out_dir $OUT $MAM
    ENCODERS="$ENCODERS $OUT/mam_iter$K.pt"
    TOKENIZERS="$TOKENIZERS $OUT/tokenizer_iter$K.pt"
done

# 3+: the encoder of iteration 2 learns the classes of the training clips, and its logits teach the tokenizer
if [ $LAST -ge 3 ]; then
    finetune $TEACHER mam_iter2 $OUT/mam_iter2.pt
    stage $OUT/plus/tokenizer_iter3.pt train_tokenizer.py --iter 3 --teacher $TEACHER --out_dir $OUT/plus \
        $TOKENIZER
    stage $OUT/plus/mam_iter3.pt train_mam.py --iter 3 --out_dir $OUT/plus $MAM
    ENCODERS="$ENCODERS $OUT/plus/mam_iter3.pt"
    TOKENIZERS="$TOKENIZERS $OUT/plus/tokenizer_iter3.pt"
fi

# what came of it
if [ ! -e $OUT/report.json ]; then
    run python -m tools.report $TOKENIZERS --data $LABELLED --split ${FOLD:-test} --json $OUT/report.json
fi
for INIT in scratch $ENCODERS; do
    NAME=$(basename ${INIT/plus\/mam_iter3/mam_iter3plus} .pt)
    finetune $OUT/finetune_$NAME${FOLD:+_fold$FOLD}.pt $NAME $INIT
    run python evaluate.py --data $LABELLED ${FOLD:+--fold $FOLD} --init $INIT --probe linear \
        --name $NAME --out_dir $OUT
done
