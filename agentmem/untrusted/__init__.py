"""Read files and JSON from untrusted sources within fixed limits, and write error messages of limited length."""
