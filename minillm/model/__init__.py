"""The plain single-device decoder: config, layers, weights, tokenizer, sampling."""
