"""The words of the shop's question language: nouns, conditions and columns, each with its phrases and its SQL."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.recipes.shop import database as shop


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values of one column, split once and for all: evaluation asks about values that training never names."""

    train: tuple[str | int, ...]
    evaluation: tuple[str | int, ...]


def _open(values: tuple[str | int, ...], every: int) -> Values:
    """Hold out every n-th value for evaluation."""
    held = values[every - 1 :: every]
    return Values(train=tuple(value for value in values if value not in held), evaluation=held)


def _closed(values: tuple[str | int, ...]) -> Values:
    """A column with so few values (four segments) that holding any out would leave a hole in the language."""
    return Values(train=values, evaluation=values)


CITY = _open(tuple(shop.CITIES), 3)
COUNTRY = _open(tuple(shop.COUNTRIES), 3)
CATEGORY = _open(tuple(shop.CATEGORIES), 3)
PRICE = _open(tuple(range(100, 1000, 100)), 3)
STOCK = _open(tuple(range(100, 550, 50)), 3)
CREDIT = _open(tuple(range(100, 1000, 100)), 3)
TOTAL = _open(tuple(range(500, 6000, 500)), 3)
SIZE = _closed(tuple(range(2, 11)))  # how many of the top
SEGMENT = _closed(tuple(shop.SEGMENTS))
STATUS = _closed(tuple(shop.STATUSES))
YEAR = _closed(shop.YEARS)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One filter: `phrases` in the question, `sql` in the query, both with `{v}` for the value."""

    column: str  # "table.column"
    operator: str
    values: Values
    phrases: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name in a combination of clauses."""
        return f"{self.column}{self.operator}"

    @property
    def table(self) -> str:
        """The table that it needs."""
        return self.column.split(".")[0]

    def sql(self, value: str | int) -> str:
        """Its SQL for a value."""
        literal = f"'{value}'" if isinstance(value, str) else str(value)
        return f"{self.column} {self.operator} {literal}"


def _compare(column: str, values: Values, above: tuple[str, ...], below: tuple[str, ...]) -> tuple[Condition, ...]:
    return (
        Condition(column=column, operator=">", values=values, phrases=above),
        Condition(column=column, operator="<", values=values, phrases=below),
    )


CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "customers": (
        Condition(column="customers.city", operator="=", values=CITY, phrases=("in {v}", "from {v}")),
        Condition(
            column="customers.segment",
            operator="=",
            values=SEGMENT,
            phrases=("in the {v} segment", "of segment {v}"),
        ),
        *_compare(
            "customers.credit",
            CREDIT,
            ("with credit above {v}", "with more than {v} credit"),
            ("with credit below {v}", "with less than {v} credit"),
        ),
    ),
    "products": (
        Condition(
            column="products.category",
            operator="=",
            values=CATEGORY,
            phrases=("in category {v}", "of the {v} category"),
        ),
        *_compare(
            "products.price",
            PRICE,
            ("that cost more than {v}", "priced above {v}"),
            ("that cost less than {v}", "priced below {v}"),
        ),
        *_compare(
            "products.stock",
            STOCK,
            ("with more than {v} in stock", "with stock above {v}"),
            ("with less than {v} in stock", "with stock below {v}"),
        ),
    ),
    "orders": (
        Condition(column="orders.status", operator="=", values=STATUS, phrases=("that are {v}", "with status {v}")),
        Condition(column="orders.year", operator="=", values=YEAR, phrases=("placed in {v}", "made in {v}")),
        *_compare(
            "orders.total",
            TOTAL,
            ("worth more than {v}", "with a value above {v}"),
            ("worth less than {v}", "with a value below {v}"),
        ),
    ),
}

# Conditions on a joined table, in words that name it: "orders by customers in Paris".
JOINED: dict[str, tuple[Condition, ...]] = {
    "products": (
        Condition(
            column="suppliers.country",
            operator="=",
            values=COUNTRY,
            phrases=("from suppliers in {v}", "supplied from {v}"),
        ),
    ),
    "orders": (
        Condition(
            column="customers.city",
            operator="=",
            values=CITY,
            phrases=("by customers in {v}", "of customers from {v}"),
        ),
        Condition(
            column="customers.segment",
            operator="=",
            values=SEGMENT,
            phrases=("by customers of the {v} segment", "from the {v} segment"),
        ),
    ),
}

JOINS: dict[tuple[str, str], str] = {
    ("products", "suppliers"): "JOIN suppliers ON products.supplier_id = suppliers.id",
    ("orders", "customers"): "JOIN customers ON orders.customer_id = customers.id",
}

NOUNS: dict[str, tuple[str, ...]] = {
    "customers": ("customers", "clients"),
    "products": ("products", "items"),
    "orders": ("orders", "purchases"),
}

LISTED: dict[str, dict[str, str]] = {  # column → plural word
    "customers": {"name": "names"},
    "products": {"name": "names"},
    "orders": {"id": "ids"},
}

MEASURED: dict[str, dict[str, str]] = {  # numeric column → its word
    "customers": {"credit": "credit"},
    "products": {"price": "price", "stock": "stock"},
    "orders": {"total": "value"},
}

GROUPED: dict[str, dict[str, str]] = {  # column → its word
    "customers": {"customers.city": "city", "customers.segment": "segment"},
    "products": {"products.category": "category", "suppliers.country": "supplier country"},
    "orders": {"orders.status": "status", "orders.year": "year", "customers.city": "customer city"},
}

AGGREGATES: dict[str, tuple[str, ...]] = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "largest"),
    "MIN": ("lowest", "smallest"),
    "SUM": ("total", "combined"),
}

ENDS: dict[str, str] = {"DESC": "highest", "ASC": "lowest"}
TOPS: dict[str, str] = {"DESC": "top", "ASC": "bottom"}
