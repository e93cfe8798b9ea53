"""The names of heads."""

#: ``head`` -> transformers' table of the classes that have it (:data:`estimators.traced.build.TABLES`), and how the
#: names of those classes end.
HEADS = {
    "causal-lm": ("CAUSAL_LM", "ForCausalLM"),
    "masked-lm": ("MASKED_LM", "ForMaskedLM"),
    "seq2seq-lm": ("SEQ_TO_SEQ_CAUSAL_LM", "ForConditionalGeneration"),
    "classification": ("SEQUENCE_CLASSIFICATION", "ForSequenceClassification"),
    "token-classification": ("TOKEN_CLASSIFICATION", "ForTokenClassification"),
    "question-answering": ("QUESTION_ANSWERING", "ForQuestionAnswering"),
    "multiple-choice": ("MULTIPLE_CHOICE", "ForMultipleChoice"),
    "image-classification": ("IMAGE_CLASSIFICATION", "ForImageClassification"),
    "none": ("", "Model"),
}
