"""What running under pytest-xdist takes: plan, scheduler, integrity guards, progress, locks."""
