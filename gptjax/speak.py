def generate(config, params, tokenizer):
    pass
