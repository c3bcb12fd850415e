"""The DSpark draft model: a block of tokens in one parallel pass, put right by a small sequential head, with a confidence each.

    config      what a checkpoint's config.json says
    layers      the decoder layer, in the style of the target's family
    heads       the sequential heads (vanilla, gated, rnn) and the confidence head
    network     all of it, with the names of the released checkpoints
    packed      the training form: many blocks of a sequence in one pass
    cached      the drafting form: context keys and values kept from round to round
    checkpoint  folders on disk

DFlash is the same network without sequential head and confidence head.
"""
