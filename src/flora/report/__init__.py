"""What is shown to people: tables, plots, model cards, pages."""
