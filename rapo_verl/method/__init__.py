"""RAPO as mathematics, tensors and plain settings in, tensors out: no veRL, Ray, vLLM or config framework in here."""
