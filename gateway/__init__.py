"""The gateway: text in, text out; sessions, placement, and one error language. It never imports torch or transformers."""
