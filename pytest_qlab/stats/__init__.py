"""Paired estimates, intervals and quantiles for clustered samples; numpy only."""
