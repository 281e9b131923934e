"""The one page of the shop."""

from django.urls import path

from .views import orders, pay

urlpatterns = [path("", orders), path("pay/<int:order>", pay)]
