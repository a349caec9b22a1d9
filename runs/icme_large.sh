#!/bin/bash
# The two large encoders of the CMU-AIST submission to the ICME 2025 challenge: 300 M parameters, codes of a
# base tokenizer that has heard AudioSet alone: out/tokenizer_iter3.pt of paper_base.sh.
#
#     runs/icme_large.sh speech|balanced packs/speech,packs/yodas packs/music packs/sound TOKENIZER
#
# speech: speech, music and sound as 70:15:15. balanced: 40:30:30, without the second pack of speech (YODAS).
# Packs of one kind share by their hours.
#
# Shares are of the sampled seconds, so what is short is repeated; the start prints how often each pack is
# heard. With the paper's hours all are heard alike: 16.4 k h of speech, 34.8 k of YODAS, 11.5 k of music and
# of sound stand as 69:15:15, without YODAS as 42:29:29. So the 1.19 M h of a run are each of them 15 to 16
# times, or 29 to 31. (Were YODAS heard in balanced as well: speech 9 times, music and sound 31.)
#
# Lengths, rates and batch are those of the published configuration. On 8 GPUs a rank's share of 670 s goes
# through in one part, some 22 GB as counted. The environment that it heeds: stages.sh; OUT is out/icme_speech
# or out/icme_balanced. Not run yet: it needs the corpora and GPUs. Then both side by side, as in the paper:
#
#     python evaluate.py --data packs/esc50 --probe mlp \
#         --init out/icme_speech/mam_iter3.pt,out/icme_balanced/mam_iter3.pt
GPUS=${GPUS:-8}
KINDS="packs/speech,packs/yodas packs/music packs/sound"
USAGE="usage: runs/icme_large.sh speech|balanced $KINDS TOKENIZER"
NAME=$1 SPEECH=$2 MUSIC=$3 SOUND=$4 CODES=${5:?$USAGE}
case $NAME in
    speech)   MIXTURE="70=$SPEECH 15=$MUSIC 15=$SOUND" ;;
    balanced) MIXTURE="40=${SPEECH%%,*} 30=$MUSIC 30=$SOUND" ;;
    *)
        echo "$USAGE" >&2
        exit 1 ;;
esac
OUT=${OUT:-out/icme_$NAME}
. runs/stages.sh
FLAGS="--crop_seconds 0 --batch_seconds 5340 --device_seconds 700 --max_steps 800000 --warmup_steps 40000
       --lr 2.5e-4 --weight_decay 0.01 --model large --workers 4 --compile --log_every 100
       --eval_every 5000 --save_every 5000 --keep_every 50000 $MAM"

# SHARE=PACK,PACK ... -> PACK:SHARE,..., by the hours of the packs; how often they are heard goes to stderr
DATA=$(python - $MIXTURE -- $FLAGS <<'END'
import argparse
import json
import sys

parser = argparse.ArgumentParser()
parser.add_argument("--max_steps", "--max-steps", type=int)
parser.add_argument("--batch_seconds", "--batch-seconds", type=float)
between = sys.argv.index("--")
flags, _ = parser.parse_known_args(sys.argv[between + 1 :])
heard = flags.max_steps * flags.batch_seconds / 3600

data = []
for kind in sys.argv[1:between]:
    share, _, packs = kind.partition("=")
    packs = packs.split(",")
    hours = [json.load(open(f"{pack}/pack.json"))["hours"] for pack in packs]
    for pack, there in zip(packs, hours):
        percent = float(share) * there / sum(hours)
        times = heard * percent / 100 / there
        data.append(f"{pack}:{percent:.6g}")
        print(
            f"{pack}: {percent:.1f} % of the {heard:,.4g} h heard, of {there:,.4g} h: {times:.3g} times",
            file=sys.stderr
        )
print(",".join(data))
END
)
stage $OUT/mam_iter3.pt train_mam.py --iter 3 --data $DATA --tokenizer $CODES --out_dir $OUT $FLAGS
