"""Optimizers of one stage: step per layer, MuonAdamW, fp32 masters, loss scales, ZeRO-1."""
