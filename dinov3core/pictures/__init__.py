"""What features look like: colours, sheets, charts and pages.

Draws what `dinov3core.evals` and a model give.
"""
