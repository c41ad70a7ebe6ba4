#!/usr/bin/env bash
# The trainings on another machine: away.sh ARCHIVE WHEELS OUT MINUTES [JOBS]. The archive holds a folder `travel` with the
# data, the cache and MiniLM-L6; results come as JSON lines. Text is trained on the GPU, everything else on the processor.
set -u
archive=$1 wheels=$2 out=$3 minutes=$4 jobs=${5:-12}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$wheels"/*.whl
tar xJf "$archive" -C /tmp
export PYTHONPATH=$PWD/src:/tmp/site OMP_NUM_THREADS=1 FLORA_CACHE=/tmp/travel/cache HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
run="python3 -m benchmarks.quality.run --data /tmp/travel --model /tmp/travel/minilm --minutes $minutes"
main=flora-gradient,lora,lycoris,flora,lora-gradient,full,bitfit,flora-equal
CUDA_VISIBLE_DEVICES= $run --results "$out/processor.jsonl" --tasks hippocampus,spoken,cifar --methods $main \
    --seeds 0,1,2,3,4 --rates 0.01,0.003,0.03 --jobs "$jobs" >"$out/processor.log" 2>&1 &
$run --results "$out/gpu.jsonl" --tasks sst2 --methods $main --seeds 0,1,2,3,4 --rates 0.01,0.003 --jobs 3 \
    >"$out/gpu.log" 2>&1 &
wait
grep -h "seed" "$out"/*.log | tail -5
wc -l "$out"/*.jsonl
