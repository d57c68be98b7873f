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
PRODUCT = _open(tuple(shop.product_names()), 3)
PRICE = _open(tuple(range(100, 950, 50)), 3)
STOCK = _open(tuple(range(50, 600, 50)), 3)
CREDIT = _open(tuple(range(100, 950, 50)), 3)
TOTAL = _open(tuple(range(500, 5750, 250)), 3)
SIZE = _open(tuple(range(2, 14)), 3)  # how many of the top, how many in a group
SEGMENT = _closed(tuple(shop.SEGMENTS))
STATUS = _closed(tuple(shop.STATUSES))
YEAR = _closed(shop.YEARS[1:-1])
RATING = _closed(shop.RATINGS[1:-1])


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
        Condition(column="customers.city", operator="=", values=CITY, phrases=("in {v}", "from {v}", "living in {v}")),
        Condition(
            column="customers.segment",
            operator="=",
            values=SEGMENT,
            phrases=("in the {v} segment", "of the {v} segment", "of segment {v}"),
        ),
        *_compare(
            "customers.joined",
            YEAR,
            ("who joined after {v}", "that signed up after {v}"),
            ("who joined before {v}", "that signed up before {v}"),
        ),
        *_compare(
            "customers.credit",
            CREDIT,
            ("with credit above {v}", "with more than {v} credit", "whose credit exceeds {v}"),
            ("with credit below {v}", "with less than {v} credit", "whose credit is under {v}"),
        ),
    ),
    "suppliers": (
        Condition(
            column="suppliers.country", operator="=", values=COUNTRY, phrases=("in {v}", "from {v}", "based in {v}")
        ),
        *_compare(
            "suppliers.rating",
            RATING,
            ("rated above {v}", "with a rating over {v}"),
            ("rated below {v}", "with a rating under {v}"),
        ),
    ),
    "products": (
        Condition(
            column="products.category",
            operator="=",
            values=CATEGORY,
            phrases=("in category {v}", "of the {v} category", "in the {v} section"),
        ),
        Condition(
            column="products.name",
            operator="=",
            values=PRODUCT,
            phrases=("called {v}", "named {v}", "with the name {v}"),
        ),
        *_compare(
            "products.price",
            PRICE,
            ("that cost more than {v}", "priced above {v}", "with a price over {v}"),
            ("that cost less than {v}", "priced below {v}", "with a price under {v}"),
        ),
        *_compare(
            "products.stock",
            STOCK,
            ("with more than {v} in stock", "with stock above {v}"),
            ("with less than {v} in stock", "with stock below {v}"),
        ),
    ),
    "orders": (
        Condition(
            column="orders.status",
            operator="=",
            values=STATUS,
            phrases=("that are {v}", "with status {v}", "marked {v}"),
        ),
        Condition(
            column="orders.year",
            operator="=",
            values=YEAR,
            phrases=("placed in {v}", "made in {v}", "from the year {v}"),
        ),
        *_compare(
            "orders.total",
            TOTAL,
            ("worth more than {v}", "with a total above {v}", "over {v} in value"),
            ("worth less than {v}", "with a total below {v}", "under {v} in value"),
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
            phrases=("from suppliers in {v}", "supplied from {v}", "made by suppliers based in {v}"),
        ),
        *_compare(
            "suppliers.rating",
            RATING,
            ("from suppliers rated above {v}", "whose supplier has a rating over {v}"),
            ("from suppliers rated below {v}", "whose supplier has a rating under {v}"),
        ),
    ),
    "orders": (
        Condition(
            column="customers.city",
            operator="=",
            values=CITY,
            phrases=("by customers in {v}", "of customers from {v}", "placed by people living in {v}"),
        ),
        Condition(
            column="customers.segment",
            operator="=",
            values=SEGMENT,
            phrases=("by customers of the {v} segment", "from the {v} segment"),
        ),
    ),
    "order_items": tuple(condition for condition in CONDITIONS["products"]),
}

JOINS: dict[tuple[str, str], str] = {
    ("products", "suppliers"): "JOIN suppliers ON products.supplier_id = suppliers.id",
    ("orders", "customers"): "JOIN customers ON orders.customer_id = customers.id",
    ("order_items", "products"): "JOIN products ON order_items.product_id = products.id",
}

NOUNS: dict[str, tuple[str, ...]] = {
    "customers": ("customers", "clients", "shoppers"),
    "suppliers": ("suppliers", "vendors"),
    "products": ("products", "items", "articles"),
    "orders": ("orders", "purchases"),
    "order_items": ("products", "items", "articles"),
}

LISTED: dict[str, dict[str, str]] = {  # column → plural word
    "customers": {"name": "names", "city": "cities", "credit": "credits"},
    "suppliers": {"name": "names", "country": "countries", "rating": "ratings"},
    "products": {"name": "names", "price": "prices", "stock": "stock levels", "category": "categories"},
    "orders": {"id": "ids", "total": "totals", "status": "statuses"},
}

MEASURED: dict[str, dict[str, tuple[str, ...]]] = {  # numeric column → words
    "customers": {"credit": ("credit", "credit limit")},
    "suppliers": {"rating": ("rating",)},
    "products": {"price": ("price", "cost"), "stock": ("stock", "stock level")},
    "orders": {"total": ("total", "value")},
}

GROUPED: dict[str, dict[str, tuple[str, str]]] = {  # column → singular, plural
    "customers": {
        "customers.city": ("city", "cities"),
        "customers.segment": ("segment", "segments"),
        "customers.joined": ("joining year", "joining years"),
    },
    "suppliers": {"suppliers.country": ("country", "countries"), "suppliers.rating": ("rating", "ratings")},
    "products": {
        "products.category": ("category", "categories"),
        "suppliers.country": ("supplier country", "supplier countries"),
    },
    "orders": {
        "orders.status": ("status", "statuses"),
        "orders.year": ("year", "years"),
        "customers.city": ("customer city", "customer cities"),
    },
    "order_items": {"products.category": ("category", "categories")},
}

AGGREGATES: dict[str, tuple[str, ...]] = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "largest", "maximum"),
    "MIN": ("lowest", "smallest", "minimum"),
    "SUM": ("total", "combined"),
}
