"""How a draft model is trained: samples that the target wrote, the target's states on them, the loss, and the loop.

prompts   the chat format, and prompts from files
writer    the target writes prompts and answers, many sequences at once
samples   what was written, on disk; a run that was killed goes on where it stopped
states    what the target thought while it read a sample: taps and final hidden states
"""
