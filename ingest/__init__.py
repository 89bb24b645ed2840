"""Ingestion: from robot episodes in object storage to the tables of a lake."""
