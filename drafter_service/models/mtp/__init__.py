"""MTP-1: one decoder layer behind the target that predicts one token further, as DeepSeek-V3 has it.

For position i it reads the target's final hidden state there and the token at i + 1, and predicts the token at i + 2. So at a
session's end, where the last state stands before the anchor, it drafts the one token behind the anchor.
"""
