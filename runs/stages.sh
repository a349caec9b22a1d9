# What the recipes share. A recipe is a row of stages, each of which ends with a checkpoint. The same command
# again goes on where it was interrupted: finished stages are kept, a half-done one is resumed. What a recipe
# heeds in the environment:
#
#   GPUS=8                      ranks on this machine, by torchrun (with --device cpu: processes); 1 = python
#   LAUNCH="torchrun ..."       instead, as for several machines: the same command on each, in a shared folder
#   OUT=out                     folder of checkpoints, logs and results
#   MAM, TOKENIZER, FINETUNE    flags for every stage of a kind, which override those of the recipe, as in
#                               FINETUNE="--device_seconds 200" for a smaller card
#   DRY_RUN=1                   print the commands, run nothing
set -e
OUT=${OUT:-out}
if [ ${GPUS:-1} -gt 1 ]; then
    LAUNCH=${LAUNCH:-torchrun --standalone --nproc_per_node $GPUS}
fi
LAUNCH=${LAUNCH:-python}

# run COMMAND...: say what is done, and do it
run() {
    echo "+ $*"
    if [ -z "$DRY_RUN" ]; then "$@"; fi
}

# finished CHECKPOINT: has it seen its last step, and a classifier its test?
finished() {
    [ -e "$1" ] && python - "$1" <<'END'
import sys
from pathlib import Path
from common import CheckpointError, read_checkpoint

path = Path(sys.argv[1])
try:
    ckpt = read_checkpoint(path)
except CheckpointError:
    sys.exit(1)  # the script that is to go on from it says what is wrong
done = ckpt["step"] >= ckpt["config"]["max_steps"]
tested = ckpt["kind"] != "classifier" or path.with_suffix(".csv").exists()
sys.exit(not (done and tested))
END
}

# stage CHECKPOINT SCRIPT FLAG...: run a script unless its checkpoint is finished
stage() {
    local checkpoint=$1 resume=
    shift
    if finished "$checkpoint"; then
        echo "$checkpoint is finished"
        return
    fi
    if [ -e "$checkpoint" ]; then resume=--resume; fi

    # the status alone does not tell: it is 0 as well where a signal made the script save and end
    if run $LAUNCH "$@" $resume && [ -n "$DRY_RUN" ] || finished "$checkpoint"; then return; fi
    echo "$checkpoint is not finished; the same command goes on from there" >&2
    exit 1
}
