"""Which adapters a sample gets: selection, fusion and mixture of LoRAs, one sample after another."""
