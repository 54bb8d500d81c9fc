from transformers import PreTrainedTokenizerFast
def load_tokenizer(path):
    return PreTrainedTokenizerFast.from_pretrained(path)
