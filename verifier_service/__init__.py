"""The verifier: hosts the target, owns all committed tokens, and checks blocks of many sessions in one forward."""
