from django.apps import apps
from django.contrib import admin
from django.urls import path

urlpatterns = [path("admin/", admin.site.urls)]

if apps.is_installed("flash_celery.django"):
    from flash_celery.django.admin import register

    operations = admin.AdminSite("operations")
    register(operations)
    urlpatterns += [path("operations/", operations.urls)]
