"""What everything else stands on: rows, the ledger, dither, the registry of names. No torch, nothing of the rest."""
