"""Release gates: careful assertions, saved baselines, floors under budgets."""
