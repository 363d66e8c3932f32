"""Export in the Hugging Face format, which `from_pretrained` loads without lit_ft."""
