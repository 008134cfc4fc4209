# open_clip's own training with an adapter of ours on the model that it creates, and terms of ours in its loss.
#
#   bash configs/integrations/open_clip_train.sh ViT-B-32/laion2b_s34b_b79k folder:photos pairs.csv
#
# MODEL is what `corda-vlm` loads (NAME/TAG, or a folder with open_clip's files), KNOWLEDGE a data spec of what is to be kept,
# PAIRS a csv with the columns filepath and title, separated by tabs, as open_clip_train reads it.
#
# Versions: open_clip_torch 3 with its extra [training] (run with 3.3.0, PEFT 0.21.2).
#
# Expect: its log lists `Anchor` and `Distill`, weighted, which begin at 0, as the adapter starts where the base is.
# `logs/digits/checkpoints` resume with `--resume latest`; at the end `logs/digits/adapter` is for corda_vlm.load_adapter, and
# `logs/digits/merged` a plain model: open_clip.create_model("local-dir:logs/digits/merged").
set -e
model=$1 knowledge=$2 pairs=$3
if [ -d "$model" ]; then created=(--model "local-dir:$model"); else created=(--model "${model%%/*}" --pretrained "${model#*/}"); fi

corda-vlm calibrate "$model" "$knowledge" --samples 256 --towers vision
corda-vlm plan "$model" --covariance covariance.safetensors --mode kpm --a-norm 10 --rank 8 --towers vision
python -m corda_vlm.integrations.open_clip_train "${created[@]}" \
    --train-data "$pairs" --dataset-type csv --batch-size 64 --epochs 4 --lr 5e-4 --wd 0 --warmup 20 \
    --precision fp32 --name digits --logs logs \
    --corda-plan plan.json --corda-anchor 10 --corda-covariance covariance.safetensors \
    --corda-distill 30 --corda-knowledge "$knowledge" "${@:4}"
