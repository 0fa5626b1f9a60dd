"""From runs to tables, figures and the report."""
