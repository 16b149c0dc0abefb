"""Wide search: fill a table of many rows from a library of small pages; scored by code.

tables      real countries, cities and airports
corpus      the library: a page an entity, list pages, pages that look alike
phrases     sentences for facts, and back
questions   tasks drawn from a seed
markdown    tables in text
scoring     item-F1, row-F1 and success
"""

from perilune.tasks.wide_table.corpus import Document, build_corpus, list_title, shrink_corpus
from perilune.tasks.wide_table.markdown import ParsedTable, parse_row, parse_table, render_table
from perilune.tasks.wide_table.phrases import read_fact
from perilune.tasks.wide_table.questions import Bound, Question, WideTableTask, read_question, wide_table_task
from perilune.tasks.wide_table.scoring import TableScore, normalized, score_table, to_number
from perilune.tasks.wide_table.tables import Column, Table, key_of, load_tables

__all__ = [
    "Bound",
    "Column",
    "Document",
    "ParsedTable",
    "Question",
    "Table",
    "TableScore",
    "WideTableTask",
    "build_corpus",
    "key_of",
    "list_title",
    "load_tables",
    "normalized",
    "parse_row",
    "parse_table",
    "read_fact",
    "read_question",
    "render_table",
    "score_table",
    "shrink_corpus",
    "to_number",
    "wide_table_task",
]
