#!/bin/bash
# The papers' claims, with the tiny model on a few hours of sound: every row with three seeds (widths of the
# predictor: two), frozen on three labelled sets and fine-tuned on two of them, which pre-training and
# tokenizers heard in part: ESC-50 folds 1 to 4, the training speakers of the words. Then tables and figure:
#
#     runs/evidence.sh AUDIO                      # two jobs at a time, each on a thread of its own
#     python -m tools.evidence out/evidence
#
# AUDIO holds four tables with the columns path, label, fold_or_split and group: esc50/meta.csv (folds 1 to 5),
# arabic_kws/meta.csv (train, val, test), ravdess/meta.csv (folds), and pretrain_mix/meta.csv, whose labels
# begin with speech or music.
#
# The same command goes on where it was interrupted. One job alone: runs/evidence.sh AUDIO JOB SEED. In the
# environment: OUT; JOBS=2; FIRST=smooth, the iteration 1 that all later ones build on; and what stages.sh
# heeds. Each stage has a log in $OUT/logs, which says what it cost.
#
# A pre-training of 4,000 steps and its scores take 20 to 30 minutes of a core where bfloat16 is fast; all
# of it, some 60 pre-trainings, a day on two.
USAGE="usage: runs/evidence.sh AUDIO [JOB SEED]"
AUDIO=${1:?$USAGE} JOB=$2 SEED=$3
OUT=${OUT:-out/evidence}
. runs/stages.sh
JOBS=${JOBS:-2}
SEEDS="0 1 2"
PACKS=$OUT/packs
SETS="esc50 words emotions"
HEARD="--data $PACKS/esc50,$PACKS/speech,$PACKS/music --leave_out 5"
FIRST=${FIRST:-smooth}
MAM="--batch_seconds 82 --max_steps 4000 --warmup_steps 400 --log_every 100 $MAM"
TOKENIZER="--max_steps 800 --log_every 100 $TOKENIZER"
TIMEFORMAT="core seconds: %U + %S"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# logged NAME COMMAND...: what it prints, and what it costs, go to the log of that name
logged() {
    local log=$OUT/logs/$1.log
    shift
    if [ -n "$DRY_RUN" ]; then "$@"; return; fi
    mkdir -p $OUT/logs
    if ! { time ( "$@" ); } >> $log 2>&1; then
        echo "failed; see $log" >&2
        exit 1
    fi
}

# pack NAME TABLE: unless it is there
pack() {
    [ -e $PACKS/$1/pack.json ] || logged pack_$1 run python data.py csv $2 --out $PACKS/$1
}

# mam FOLDER ITERATION FLAG...: pre-train an encoder, by the code in $CODE if that is another
mam() {
    local folder=$1 iteration=$2
    shift 2
    logged mam_${folder//\//_}_$iteration stage $OUT/$folder/mam_iter$iteration.pt \
        ${CODE:+$CODE/}train_mam.py --iter $iteration --out_dir $OUT/$folder --seed $SEED $MAM "$@"
}

# tokenizer FOLDER ITERATION FLAG...
tokenizer() {
    local folder=$1 iteration=$2
    shift 2
    logged tokenizer_${folder//\//_}_$iteration stage $OUT/$folder/tokenizer_iter$iteration.pt \
        train_tokenizer.py --iter $iteration --out_dir $OUT/$folder --seed $SEED $HEARD $TOKENIZER "$@"
}

# probe FOLDER NAME SET INIT FLAG...: a frozen linear probe, unless its last fold is there
probe() {
    local folder=$1 name=$2_$3 set=$3 init=$4 fold= last=
    shift 4
    case $set in
        esc50) fold="--fold 5" last=_fold5 ;;
        emotions) last=_fold6 ;;
    esac
    [ -e $OUT/$folder/linear_$name$last.csv ] || logged linear_${folder//\//_}_$name \
        run python evaluate.py --data $PACKS/$set $fold --init $init --out_dir $OUT/$folder --name $name "$@"
}

# finetune FOLDER NAME INIT: on the fold of ESC-50 and on the words
finetune() {
    logged finetune_${1//\//_}_$2_esc50 stage $OUT/$1/finetune_$2_esc50_fold5.pt finetune.py \
        --data $PACKS/esc50 --fold 5 --init $3 --out_dir $OUT/$1 --name $2_esc50 \
        --max_steps 1000 --eval_every 10000 --seed $SEED $FINETUNE
    logged finetune_${1//\//_}_$2_words stage $OUT/$1/finetune_$2_words.pt finetune.py \
        --data $PACKS/words --init $3 --out_dir $OUT/$1 --name $2_words \
        --max_steps 600 --warmup_steps 60 --eval_every 10000 --seed $SEED $FINETUNE
}

# scores FOLDER ITERATION: all that is asked of an encoder
scores() {
    local set name=iter$2 init=$OUT/$1/mam_iter$2.pt
    for set in $SETS; do
        probe $1 $name $set $init
        probe $1 ${name}_all $set $init --layers all
    done
    finetune $1 $name $init
}

# tables of what is in several of the four: words' training speakers and speech, music; all labels of 3+
tables() {
    python - $AUDIO $PACKS <<'END'
import csv
import sys
from pathlib import Path

audio, packs = Path(sys.argv[1]).resolve(), Path(sys.argv[2])


def rows(name):
    for row in csv.DictReader(open(audio / name / "meta.csv")):
        yield dict(row, path=audio / name / row["path"])


def write(name, rows):
    columns = ["path", "label", "fold_or_split", "group"]
    with open(packs / name, "w") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


words = list(rows("arabic_kws"))
heard = [row for row in words if row["fold_or_split"] == "train"]
mix = list(rows("pretrain_mix"))
split = {"5": "test"}
sounds = [dict(row, fold_or_split=split.get(row["fold_or_split"], "train")) for row in rows("esc50")]
write("speech.csv", heard + [row for row in mix if row["label"].startswith("speech")])
write("music.csv", [row for row in mix if row["label"].startswith("music")])
write("labels.csv", words + sounds)
everything = heard + mix + [row for row in sounds if row["fold_or_split"] == "train"]
write("half.csv", everything[::2])
write("quarter.csv", everything[::4])
END
}

packs() {
    if [ -z "$DRY_RUN" ]; then
        mkdir -p $PACKS
        tables
        changed_code
    fi
    pack esc50 $AUDIO/esc50/meta.csv
    pack words $AUDIO/arabic_kws/meta.csv
    pack emotions $AUDIO/ravdess/meta.csv
    for name in speech music labels half quarter; do pack $name $PACKS/$name.csv; done
}

# copies of the code with a change; "raw" is reconstruction without the line that normalises patches
changed_code() {
    local name
    for name in reconstruct reconstruct_raw all_patches block_masking; do
        rm -rf $OUT/code/$name
        mkdir -p $OUT/code/$name
        cp -R *.py recipes $OUT/code/$name
        patch -s -d $OUT/code/$name -p1 < changes/${name%_raw}.diff
    done
    sed -i.before '/patches = F.layer_norm/d' $OUT/code/reconstruct_raw/train_mam.py
}

# 1. What is predicted in iteration 1: codes of either random projection, or the patches themselves
scratch() {
    for set in $SETS; do
        probe scratch/$SEED scratch $set scratch --seed $SEED
        probe scratch/$SEED scratch_all $set scratch --seed $SEED --layers all
    done
    finetune scratch/$SEED scratch scratch
}
smooth() { mam smooth/$SEED 1 $HEARD --projection smooth; scores smooth/$SEED 1; }
plain() { mam plain/$SEED 1 $HEARD --projection plain; scores plain/$SEED 1; }
reconstruct() { CODE=$OUT/code/$JOB mam $JOB/$SEED 1 $HEARD; scores $JOB/$SEED 1; }
reconstruct_raw() { reconstruct; }

# 2. Iterations. 3+: the teacher is iteration 2, fine-tuned with the labels of two sets at once
iterations() {
    local folder=$JOB/$SEED
    tokenizer $folder 2 --teacher $OUT/$FIRST/$SEED/mam_iter1.pt $CODES
    mam $folder 2 $HEARD
    scores $folder 2
    tokenizer $folder 3 --teacher $OUT/$folder/mam_iter2.pt $CODES
    mam $folder 3 $HEARD
    scores $folder 3
}
iterations_whiten() { CODES="--targets whiten --disturb 0.5 --estimator_blocks 1" iterations; }
plus() {
    local teacher=$OUT/plus/$SEED/finetune_labels.pt
    logged finetune_plus_${SEED}_labels stage $teacher finetune.py --data $PACKS/labels --name labels \
        --init $OUT/iterations/$SEED/mam_iter2.pt --out_dir $OUT/plus/$SEED --max_steps 4000 \
        --eval_every 1000 --seed $SEED $FINETUNE
    tokenizer plus/$SEED 3 --teacher $teacher
    mam plus/$SEED 3 $HEARD
    scores plus/$SEED 3
}

# 3. Mixtures: the same seconds heard, in other shares of speech, music and sounds of the surroundings
mixture() {
    local data=$PACKS/speech:$1,$PACKS/music:$2,$PACKS/esc50:$3
    mam $JOB/$SEED 1 --data $data --leave_out 5 --projection $FIRST
    scores $JOB/$SEED 1
}
speech_heavy() { mixture 70 15 15; }
balanced() { mixture 40 30 30; }

# 4. Ensembles: features of the two mixtures side by side, and of two seeds of one; means of probabilities
both() {
    local name=$1 set
    for set in $SETS; do
        probe ensembles/$SEED $name $set $2,$3
    done
}
ensembles() {
    local other=$(((SEED + 1) % 3)) kind seed members= sixth=
    [ $SEED != 0 ] || sixth=2 # all six are the same for every seed
    both mixtures $OUT/speech_heavy/$SEED/mam_iter1.pt $OUT/balanced/$SEED/mam_iter1.pt
    for kind in speech_heavy balanced; do
        both $kind $OUT/$kind/$SEED/mam_iter1.pt $OUT/$kind/$other/mam_iter1.pt
    done
    for seed in $SEED $other $sixth; do
        for kind in speech_heavy balanced; do
            members=$members${members:+,}$OUT/$kind/$seed/finetune_iter1_
        done
        average esc50 _fold5 "--fold 5"
        average words
    done
}

# average SET SUFFIX FLAG...: the mean of fine-tuned members, and each alone
average() {
    local set=$1 suffix=$2 files=${members//iter1_/iter1_$1$2.pt}
    local all=(${members//,/ })
    local name=${#all[@]}_$set
    [ -e $OUT/ensembles/$SEED/ensemble_$name$suffix.csv ] || logged ensemble_${SEED}_$name run \
        python evaluate.py --data $PACKS/$set $3 --ensemble $files --out_dir $OUT/ensembles/$SEED --name $name
}

# 5. What the predictor's width is worth; 128 is the one of all other rows
predictor() {
    local folder=predictor_$1/$SEED
    mam $folder 1 $HEARD --projection $FIRST --predictor_dim $1
    scores $folder 1
    mam $folder 2 $HEARD --tokenizer $OUT/iterations/$SEED/tokenizer_iter2.pt --predictor_dim $1
    scores $folder 2
}
predictor_192() { predictor 192; }
predictor_96() { predictor 96; }
predictor_64() { predictor 64; }

# 6. What else: the encoder sees all patches; masks are blocks, on the codes of iteration 2; less sound
all_patches() {
    CODE=$OUT/code/$JOB mam $JOB/$SEED 1 $HEARD --projection $FIRST
    scores $JOB/$SEED 1
}
block_masking() {
    CODE=$OUT/code/$JOB mam $JOB/$SEED 2 $HEARD --tokenizer $OUT/iterations/$SEED/tokenizer_iter2.pt
    scores $JOB/$SEED 2
}
half() {
    mam $JOB/$SEED 1 --data $PACKS/$JOB --projection $FIRST
    scores $JOB/$SEED 1
}
quarter() { half; }

# at_once JOB...: each with every seed, $JOBS of them at a time
at_once() {
    for seed in $SEEDS; do for job in "$@"; do echo $job $seed; done; done \
        | xargs -P $JOBS -n 2 bash "$0" $AUDIO
}

if [ -z "$DRY_RUN" ] && [ ! -e "$AUDIO/esc50/meta.csv" ]; then
    echo "$AUDIO/esc50/meta.csv: no such table. $USAGE" >&2
    exit 1
fi
if [ -n "$JOB" ]; then
    if ! declare -F "$JOB" > /dev/null || { [ -z "$SEED" ] && [ $JOB != packs ]; }; then
        echo "no such job, or no seed: $JOB $SEED. $USAGE; jobs stand at the end of this file" >&2
        exit 1
    fi
    $JOB
    exit
fi
packs
at_once smooth plain reconstruct reconstruct_raw scratch
at_once iterations
at_once iterations_whiten plus
at_once speech_heavy balanced
at_once ensembles
SEEDS="0 1"
at_once predictor_192 predictor_96 predictor_64
SEEDS="0 1 2"
at_once all_patches block_masking half quarter
