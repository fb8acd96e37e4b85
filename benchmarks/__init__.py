"""Speed and quality as ratios, measured in one run: see README.md."""
