#!/bin/bash
# The two large encoders of the CMU-AIST submission to the ICME 2025 challenge: 300 M parameters, 74,000
# hours, codes of a base tokenizer. Not run yet: it needs the corpora and GPUs. Lengths, rates and batch
# are those of its published configuration. --data mixes by shares of the sampled seconds.
#
#     runs/icme_large.sh packs/speech packs/music packs/sound out/tokenizer_iter3.pt speech|balanced
set -e
SPEECH=$1 MUSIC=$2 SOUND=$3 TOKENIZER=$4
case $5 in
    speech)   MIX=$SPEECH:70,$MUSIC:15,$SOUND:15 ;;
    balanced) MIX=$SPEECH:40,$MUSIC:30,$SOUND:30 ;;
    *)
        echo "the fifth argument is speech or balanced"
        exit 1 ;;
esac
torchrun --nproc_per_node ${GPUS:-8} train_mam.py --iter 3 --data $MIX --tokenizer $TOKENIZER --model large \
    --out_dir out/icme_$5 --crop_seconds 0 --batch_seconds 5340 --device_seconds 170 \
    --max_steps 800000 --warmup_steps 40000 --lr 2.5e-4 --weight_decay 0.01 --workers 4 --compile \
    --eval_every 5000 --save_every 5000 --log_every 100
