"""Networks that only training needs, and folders of weights."""
