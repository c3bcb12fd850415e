"""The drafter: dials its verifiers, drafts blocks with confidences for the sessions it is invited to."""
