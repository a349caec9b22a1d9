#!/bin/bash
# The paper's self-supervised iterations at base size (Table 4; 16 GPUs there).
# Not run yet: it needs AudioSet and GPUs.
#
#     runs/paper_base.sh packs/audioset
set -e
RUN="torchrun --nproc_per_node ${GPUS:-8}"
SHARED="--data $1 --crop_seconds 0 --device_seconds 350 --max_steps 400000 --warmup_steps 32000
        --weight_decay 0.01 --workers 4 --compile --eval_every 5000 --save_every 5000 --log_every 100"
MAM="--model base --batch_seconds 5600 --lr 5e-4"
$RUN train_mam.py --iter 1 $SHARED $MAM
for K in 2 3; do
    $RUN train_tokenizer.py --iter $K $SHARED --preset ssl
    $RUN train_mam.py --iter $K $SHARED $MAM
done
