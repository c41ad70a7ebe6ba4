#!/usr/bin/env bash
# The trainings on another machine, in two parts that may run one after the other or side by side:
#   away.sh processor ARCHIVE WHEELS OUT MINUTES JOBS    images, volumes and speech, a process of one thread per job
#   away.sh gpu       ARCHIVE WHEELS OUT MINUTES JOBS    text, several processes on one GPU
# The archive holds a folder `travel` with the data, the cache and MiniLM-L6. OUT gets results as JSON lines, and logs.
# No training is begun when the minutes are over.
set -u
part=$1 archive=$2 wheels=$3 out=$4 minutes=$5 jobs=$6
ends=$(($(date +%s) + $(python3 -c "print(int(60 * $minutes))")))
here=$(mktemp -d)
mkdir -p "$here"
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$here/site" "$wheels"/*.whl
tar xJf "$archive" -C "$here"
export PYTHONPATH=$PWD/src:$here/site OMP_NUM_THREADS=1 FLORA_CACHE=$here/travel/cache
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
main=flora-gradient,lora,lycoris,flora,lora-gradient,full,bitfit,flora-equal

trainings() { # what is asked for, in the time that is left
    left=$(python3 -c "import time; print(max(0.0, ($ends - time.time()) / 60))")
    python3 -m benchmarks.quality.run --data "$here/travel" --model "$here/travel/minilm" --minutes "$left" \
        --jobs "$jobs" --results "$out/$part.jsonl" "$@" >>"$out/$part.log" 2>&1
}

if [ "$part" = gpu ]; then
    trainings --tasks sst2 --methods $main --seeds 0,1,2,3,4 --rates 0.01,0.003
else
    export CUDA_VISIBLE_DEVICES=
    trainings --tasks hippocampus,spoken,cifar --methods $main --seeds 0,1,2,3,4 --rates 0.01,0.003,0.03
    trainings --tasks hippocampus,spoken,cifar --methods dora,rslora,miss,hira,loha,lokr,frozen,authors --seeds 0,1,2
    trainings --tasks cifar,hippocampus,spoken --methods flora-gradient,lora,lycoris,flora --seeds 0,1,2 --lengths 3
fi
grep -h "seed" "$out/$part.log" | tail -3
wc -l "$out/$part.jsonl"
