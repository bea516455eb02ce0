"""What composing costs, stock against the patch: `measure` takes the seconds, `report` shows them."""
