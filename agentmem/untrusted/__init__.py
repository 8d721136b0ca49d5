"""Read files and JSON from outside within fixed limits, and write error messages of limited length about them."""
