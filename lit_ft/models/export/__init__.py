"""Export in the format that `AutoModelForCausalLM.from_pretrained` loads, without lit_ft."""
