"""The laws by name."""

from moebed.laws.abnar import Abnar
from moebed.laws.contract import Law
from moebed.laws.joint import Joint
from moebed.laws.krajewski import Krajewski
from moebed.laws.leverage import Leverage
from moebed.laws.yun import Yun

LAWS: dict[str, Law] = {law.form: law for law in (Yun(), Joint(), Krajewski(), Abnar(), Leverage())}
