"""Torch that both GPU services run: how a device is owned, how a model's forward is exact, how a token is chosen.

Only `verifier_service` and `drafter_service` import from here.
"""
