"""Reports for people."""

from jgptq.app.report.table import Variant, comparison_table, linear_table

__all__ = ["Variant", "comparison_table", "linear_table"]
