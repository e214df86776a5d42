cd .gpu
export PYTHONPATH=. PYTHONUNBUFFERED=1
nvidia-smi -L
N=$(python3 -c "import torch
from engine.kernels.device import facts
print(facts(torch.device('cuda')).name)")
mkdir -p /tmp/probe; cp engine/kernels/tuned/h100-80gb-hbm3.json /tmp/probe/$N.json
timeout 100 python3 -m benchmarks.gemm_probe --seconds 85 --out /tmp/probe --families int4:gluon --rows 64 128 256 --shapes 12288x4096 4096x4096 22016x4096 4096x11008 2>&1 | tail -14 | cut -c1-120
sed -i "s/\"device\": \"[a-z0-9-]*\"/\"device\": \"$N\"/" /tmp/probe/$N.json
cp /tmp/probe/$N.json engine/kernels/tuned/; cp /tmp/probe/$N.json /tmp/probe/best.csv $OUT/
mkdir -p $OUT/rows
for r in w4a16-kv8 w8a8-kv8 fp16 w4a16 fp16-kv8; do timeout 130 python3 -c "import sys
from benchmarks.table import main
sys.exit(main(sys.argv[1:]))" device=cuda shape=internlm7b recipes=$r out=$OUT/rows 2>&1 | tail -9 | cut -c1-330; done
