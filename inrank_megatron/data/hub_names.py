"""Names of datasets from before the hub asked for their owners, and what they are called there today."""

# Those that people train language models on. The old names were links to these; of c4 the link leads to a
# loading script, which current versions of datasets do not run, and allenai/c4 holds the same text.
LEGACY_NAMES = {
    "ag_news": "fancyzhx/ag_news",
    "bookcorpus": "bookcorpus/bookcorpus",
    "c4": "allenai/c4",
    "cc_news": "vblagoje/cc_news",
    "cnn_dailymail": "abisee/cnn_dailymail",
    "enwik8": "LTCB/enwik8",
    "imdb": "stanfordnlp/imdb",
    "lambada": "cimec/lambada",
    "openwebtext": "Skylion007/openwebtext",
    "oscar": "oscar-corpus/oscar",
    "pg19": "deepmind/pg19",
    "ptb_text_only": "ptb-text-only/ptb_text_only",
    "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
    "squad": "rajpurkar/squad",
    "the_pile": "EleutherAI/pile",
    "tiny_shakespeare": "karpathy/tiny_shakespeare",
    "wikipedia": "legacy-datasets/wikipedia",
    "wikitext": "Salesforce/wikitext",
}
