"""What runs found, as tables, figures and one page: ``python -m stasc report RUN...``."""
