"""An estimate as text, JSON, picture, and beside a measurement."""
