"""``FloraModel``: puts the adapters into a model, and works on whole adapters (load, combine, swap)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from flora.errors import UserError
from flora.layers.entries import BLOCKS
from flora.layers.patterns import exact_pattern
from flora.storage.tensors import check_finite as check_finite_file
from flora.storage.tensors import check_form_tensors
from flora.tucker.form import Tucker, concatenate
from flora.tuner import targets as find
from flora.tuner import whole
from flora.tuner.applied import mark_merged, save_merged, warn_if_merged, warn_of_scale
from flora.tuner.config import FloraConfig
from flora.tuner.elsewhere import guard_optimizers, guard_saving
from flora.tuner.layer import BASE, FloraLayer, named_layers
from flora.tuner.merging import check_finite, merged_weights
from flora.tuner.parameter import ParamWrapper
from flora.tuner.places import (
    Place,
    Places,
    find_misfit,
    find_missing,
    hidden_from_peft,
    places_of,
    put_wrappers,
    under_all_names,
)
from flora.tuner.reading import adapter_per_sample
from flora.tuner.resolution import Resolution
from flora.tuner.selection import Selection
from flora.tuner.statistics import release_statistics, settle_statistics
from flora.tuner.watching import stop_watching, watch

Found = TypeVar("Found")
# The word of the config for the biases of adapted layers.
BIAS_OF_LAYERS = "tucker_only"


class Injecting(NamedTuple):
    """Of the adapter that is being injected: which modules it selects, and its fields as PEFT must not see them."""

    selection: Selection
    shown: dict[str, Any]


class FloraModel(BaseTuner):
    """The tuner that PEFT builds from a ``FloraConfig``."""

    prefix = "tucker_"
    # While modules are replaced.
    _places: Places = {}
    tuner_layer_cls = FloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # The resolved config of the adapter that is being injected; set from the check of its targets until the last one
    # has its layer.
    _resolution: Resolution | None = None
    _injecting: Injecting | None = None

    # ---- injection -------------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: FloraConfig, model_config: dict[str, Any]) -> FloraConfig:
        """Fills in the targets: the model type's own, or every layer of the kinds a shorthand stands for."""
        wanted = peft_config.target_modules
        if shorthands := find.shorthands_in(wanted, self.model):
            names = set() if isinstance(wanted, str) else set(wanted or ()) - shorthands
            peft_config.target_modules = names.union(*(find.expand(word.lower(), self.model) for word in shorthands))
            return peft_config

        if wanted is None and peft_config.target_parameters:
            return peft_config

        if wanted is None and model_config.get("model_type") not in self.target_module_mapping:
            raise UserError(
                "target_modules is not set, and no layers are known for this kind of model. Please specify "
                "`target_modules` in `peft_config`: 'all', 'all-linear', 'all-conv', 'all-norm', or names, as in "
                "print(model)"
            )

        return cast(FloraConfig, super()._prepare_adapter_config(peft_config, model_config))

    def _prepare_model(self, peft_config: FloraConfig, model: nn.Module) -> None:
        """Resolves every target and its ranks, so that a bad request raises here, with the model untouched."""
        find.check_saved(peft_config, model)
        selection = Selection(vars(peft_config))
        sites = find.find_sites(peft_config, model, selection)
        self._resolution = Resolution(peft_config, sites)

        if not sites:
            find.explain_no_match(peft_config, model)
            return

        if peft_config.budget is not None:
            self._resolution.spend(peft_config.budget, model)

        if peft_config.fold == BLOCKS:
            self._resolution.cut_into_blocks()

        find.warn_unmatched(peft_config, model)
        self._resolution.warn()
        find.name_embeddings_in_full(peft_config, sites, model)
        self._resolution.record(peft_config)
        shown = {name: getattr(peft_config, name) for name in ("rank_pattern", "target_modules", "target_parameters")}
        self._injecting = Injecting(selection, shown)
        _hide_from_peft(peft_config, sites)

    def _check_target_module_exists(self, peft_config: FloraConfig, key: str) -> Any:
        """PEFT asks for each module of the model; during an injection the config's names are sorted out already."""
        if self._injecting is None:
            selection = Selection(vars(peft_config))
        else:
            selection = self._injecting.selection
        return selection(key)

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, FloraLayer) else target

        if parameter_name is not None:
            site = find.raw_parameter(current_key.rpartition(".")[0], base, parameter_name)
            same = isinstance(target, ParamWrapper) and target.parameter_name == parameter_name
            layer = target if same else ParamWrapper(target, parameter_name)
        else:
            quantization = get_quantization_kwargs(self.model)

            if isinstance(target, FloraLayer):
                layer = target
            else:
                layer = FloraLayer(target, quantization=quantization)

            site = find.Site(current_key, base, layer.row)

        cast(FloraLayer, layer).update_layer(adapter_name, peft_config, cast(Resolution, self._resolution).of(site))
        cast(FloraLayer, layer).place = current_key

        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)

            self._replace_module(parent, target_name, layer, target)
            self._turn_off_fast_paths(current_key)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts one module in the place of another, in all its places if it has several.

        Device and dtype are settled in ``FloraLayer.update_layer``.
        """
        for place in self._places.get(id(child), [Place(parent, child_name)]):
            place.put(new_module)

    def _turn_off_fast_paths(self, key: str) -> None:
        """Encoders of torch read their layers' weights in eval without calling them, unless one has a hook."""
        outer = self.model
        for name in key.split("."):
            inner = getattr(outer, name)

            if isinstance(outer, nn.TransformerEncoder):
                outer.use_nested_tensor = False
            if isinstance(outer, nn.TransformerEncoderLayer):
                inner.register_forward_pre_hook(_called)

            outer = inner

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection; then the first step with gradients is watched for layers that it does not reach."""
        if not any(isinstance(module, FloraLayer) for module in model.modules()):
            self._trained = {name for name, value in model.named_parameters() if value.requires_grad}

        config = self.peft_config[adapter_name]
        self._places = places_of(model)

        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            put_wrappers(model, self._places)
        finally:
            if self._injecting is not None:
                vars(config).update(self._injecting.shown)

            self._resolution = self._injecting = None
            self._places = {}

        watch(model)
        guard_saving(model)
        guard_optimizers()
        freeze = any(cast(FloraConfig, other).freeze_batch_norm for other in self.peft_config.values())
        settle_statistics(model, freeze=freeze, training=not config.inference_mode)

    # ---- merging and leaving -------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's own; a safe merge looks at every layer before it writes to the first."""
        self._check_names(adapter_names)
        if safe_merge:
            self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_names(self, adapter_names: list[str] | None) -> None:
        """PEFT merges nothing for a name that it does not know, and says nothing."""
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown:
            raise UserError(f"adapter_names has unknown adapters {unknown}; give some of {sorted(self.peft_config)}")

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        for layer in self._layers():
            wanted = layer.active_adapters if adapter_names is None else adapter_names

            adapters = [name for name in wanted if name in layer.settings and name not in layer.merged_adapters]
            if adapters:
                with onload_layer(layer):
                    check_finite(merged_weights(layer, adapters).values(), adapters, layer.place)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_names(adapter_names)
        if merge and safe_merge:
            self._check_merge(adapter_names)
        if merge:
            mark_merged(self.model, self._layers(), self.active_adapters if adapter_names is None else adapter_names)
            save_merged(self.model, self._layers())

        with hidden_from_peft(self.model, "base_layer"):
            self._places = places_of(self.model)
            model = cast(nn.Module, super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names))
        self._places = {}
        stop_watching(model)
        release_statistics(model)

        return model

    def _take_out(self, adapter_name: str) -> None:
        """Undoes the injection of an adapter that could not be loaded."""
        if len(self.peft_config) > 1:
            self.delete_adapter(adapter_name)
            return
        for name, value in self.unload().named_parameters():
            value.requires_grad_(name in self._trained)

    # ---- biases --------------------------------------------------------------------------------------------------

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """PEFT's own, but for "tucker_only": PEFT takes ``layer.bias``, which of an LSTM is a switch."""
        configs = [cast(FloraConfig, self.peft_config[adapter]) for adapter in self.active_adapters]
        wanted = any(config.bias == BIAS_OF_LAYERS for config in configs)
        before = {id(config): config.bias for config in configs}
        for config in configs:
            if config.bias == BIAS_OF_LAYERS:
                config.bias = "none"

        try:
            super()._mark_only_adapters_as_trainable(model)
        finally:
            for config in configs:
                config.bias = before[id(config)]

        for layer in self._layers() if wanted else ():
            for value in layer.biases().values():
                value.requires_grad = True

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: FloraConfig
    ) -> dict[str, Tensor]:
        """The biases that are saved with the adapter: those of "tucker_only" by our own rule."""
        if config.bias != BIAS_OF_LAYERS:
            return super()._get_learnable_bias_state_dict(model, state_dict, config)

        found = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, FloraLayer):
                continue

            path = f"{name.removeprefix('_fsdp_wrapped_module.')}.base_layer".lstrip(".")
            inside = layer.base_layer
            while isinstance(inside, FloraLayer):
                path, inside = f"{path}.base_layer", inside.base_layer

            keys = [f"{path}.{bias}" for bias in layer.biases()]
            found.update({key: state_dict[key] for key in keys if key in state_dict})

        return found

    # ---- an adapter per sample -----------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands ``adapter_names=[...]``, an adapter for each sample of the batch, to every layer for one forward."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return

        if self.training:
            raise UserError("adapter_names (an adapter for each sample) works in inference only; call model.eval()")

        unknown = sorted(set(names) - {BASE, *self.peft_config})
        if unknown:
            raise UserError(f"adapter_names has unknown adapters {unknown}; give some of {sorted(self.peft_config)}")

        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]

        # An encoder sees each sample once, whatever the number of beams.
        once: set[nn.Module] = set()
        if beams > 1:
            encoder = getattr(self.model, "get_encoder", lambda: None)()
            if isinstance(encoder, nn.Module) and encoder is not self.model:
                once = set(encoder.modules())

        handles = [
            module.register_forward_pre_hook(
                partial(_pass_names, list(names) if module in once else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (FloraLayer, AuxiliaryTrainingWrapper))
        ]

        try:
            with adapter_per_sample():
                yield
        finally:
            for handle in handles:
                handle.remove()

    # ---- whole adapters ------------------------------------------------------------------------------------------

    def _layers(self) -> list[FloraLayer]:
        return [module for module in self.model.modules() if isinstance(module, FloraLayer)]

    def _layers_with(self, adapter: str) -> dict[str, FloraLayer]:
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, FloraLayer) and adapter in module.settings
        }

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds an adapter that is the weighted sum of others, exactly: Tucker forms concatenate, so their ranks add up.

        A module of ``modules_to_save`` becomes that of the base model plus the weighted changes of it.

        Args:
            adapters: names of existing adapters.
            weights: a number for each.
            adapter_name: of the new adapter; it is not made active.

        Raises:
            ValueError: an adapter does not exist, the new name is taken, they do not adapt the same weights, or they
                hold something that has no sum: biases, other rows of an embedding, running statistics.
        """
        self._check_terms(adapters, weights, adapter_name)
        terms = list(zip(adapters, weights, strict=True))
        configs = [cast(FloraConfig, self.peft_config[adapter]) for adapter in adapters]
        held_in_full = whole.config_of_sum(configs)
        whole.check_sum(self.model, adapters)
        forms = self._summed_forms(terms)

        config = copy.deepcopy(configs[0])
        vars(config).update(held_in_full)
        config.r, config.alpha, config.scale, config.scale_pattern, config.init_weights = 8, None, 1.0, {}, True
        names = {layer: name for name, layer in named_layers(self.model)}
        layers = self._layers_with(adapters[0])
        config.rank_pattern = {
            exact_pattern(f"{names[layers[path]]}.{weight}"): list(form.ranks) for (path, weight), form in forms.items()
        }

        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        layers = self._layers_with(adapter_name)
        for (path, weight), form in forms.items():
            _copy_form(layers[path].delta(adapter_name, weight).form, form)

        whole.write_sum(self.model, terms, adapter_name)

    def _check_terms(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        if adapter_name in self.peft_config:
            raise UserError(f"adapter {adapter_name!r} already exists; delete it first or choose another name")
        if len(adapters) != len(weights) or not adapters:
            raise UserError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each adapter")

        unknown = sorted(set(adapters) - set(self.peft_config))
        if unknown:
            raise UserError(f"adapters {unknown} do not exist; there are {sorted(self.peft_config)}")

        adapted = [self._layers_with(adapter).keys() for adapter in adapters]
        if any(names != adapted[0] for names in adapted):
            raise UserError(f"the adapters {list(adapters)} do not adapt the same layers, so they have no common sum")

    @torch.no_grad()
    def _summed_forms(self, terms: Sequence[tuple[str, float]]) -> dict[tuple[str, str], Tucker]:
        """The weighted sum of adapters that adapt the same layers: (path of the layer, weight) -> its form."""
        forms = {}
        for path, layer in self._layers_with(terms[0][0]).items():
            for weight in layer.attributes:
                deltas = [layer.delta(adapter, weight) for adapter, _ in terms]
                scales = [factor * delta.scale for (_, factor), delta in zip(terms, deltas, strict=True)]
                forms[path, weight] = concatenate([delta.form for delta in deltas], scales)

        return forms

    def swap_adapter(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the tensors of a saved adapter into a live one, in place: nothing is rebuilt or recompiled.

        PEFT's own hotswap is closed to methods outside PEFT. The scale stays that of the live adapter.

        Args:
            adapter_name: of the live adapter.
            state_dict: the tensors of ``adapter_model.safetensors``, of the same ranks.

        Raises:
            ValueError: names or shapes differ, or the adapter is merged; nothing is changed then.
        """
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            raise UserError(f"{adapter_name!r} is merged into the base weights; call unmerge_adapter() before the swap")

        own = {
            f"base_model.model.{name}.{attribute}.{tensor}": value
            for name, layer in self._layers_with(adapter_name).items()
            for attribute in layer.adapter_layer_names
            for tensor, value in getattr(layer, attribute)[adapter_name].named_parameters()
        }
        given = {key: value for key, value in state_dict.items() if f".{self.prefix}" in key}
        for key in sorted(own.keys() | given.keys()):
            shapes = [tuple(side[key].shape) if key in side else None for side in (own, given)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"cannot swap {adapter_name!r}: {key} has the shape {shapes[0]} here and {shapes[1]} in the new "
                    "adapter (None: absent); load it as a new adapter instead"
                )

        with torch.no_grad():
            for key, value in own.items():
                value.copy_(given[key])

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """PEFT's own: what the tuner lacks is the model's.

        Saving reads the embeddings of the model; speech models have none, which must not stop the save.
        """
        found = super().__getattr__(name)
        if name in ("get_input_embeddings", "get_output_embeddings"):
            return partial(_if_implemented, found)
        return found

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """PEFT's own; to a model without embeddings, such as a detector whose heads are tied, none are tied."""
        return _if_implemented(super()._get_module_names_tied_with_embedding) or []

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: FloraConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """PEFT's own; says what the file will not hold."""
        warn_of_scale((module for module in model.modules() if isinstance(module, FloraLayer)), adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: FloraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, then a check that every tensor of the file has its place in this base model."""
        warn_if_merged(model, adapter_name, state_dict, cls.prefix)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        remapped = under_all_names(model, FloraLayer, remapped)
        # Besides tensors, a model's state may hold what its modules save of themselves, as neuraloperator's do.
        own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}

        try:
            _check_loaded(own, remapped, cls.prefix, adapter_name, zero=config.init_weights)
        except UserError:
            tuner = getattr(model, "base_model", None)
            if isinstance(tuner, cls):
                tuner._take_out(adapter_name)

            raise

        return remapped


def _check_loaded(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], prefix: str, adapter: str, *, zero: bool
) -> None:
    """Checks the tensors of a file, of which PEFT asks nothing but their names, before it puts them into a model."""
    misfit = find_misfit(own, given, prefix)
    if misfit:
        raise UserError(f"the adapter does not fit this base model: {misfit}; load it on the model it was trained on")

    missing = find_missing(own, given, prefix, adapter, zero=zero)
    if missing:
        raise UserError(f"the adapter's file lacks {missing}; it is incomplete, copy it again")

    ours = {key: value for key, value in given.items() if f".{prefix}" in key and not value.is_meta}
    check_form_tensors(ours, "the adapter's file")
    check_finite_file(ours, "the adapter's file")


def _hide_from_peft(config: FloraConfig, sites: Sequence[find.Site]) -> None:
    """Changes, for the time of an injection, what PEFT would match in its own way.

    It searches every module's name for every key of ``rank_pattern``, without a limit of time; it shortens a long list
    of targets, to one that can mean other modules; and it wraps raw parameters inside ``modules_to_save`` too.
    """
    config.rank_pattern = {}
    if isinstance(config.target_modules, set):
        config.target_modules = frozenset(config.target_modules)  # type: ignore[assignment]
    if config.target_parameters and config.modules_to_save:
        raw = [site for site in sites if site.row.kind == "parameter"]
        config.target_parameters = [f"{site.name}.{leaf}" for site in raw for leaf in site.row.weights(site.module)]


def _copy_form(live: Tucker, form: Tucker) -> None:
    with torch.no_grad():
        live.core.copy_(form.core)
        for own, new in zip(live.factors, form.factors, strict=True):
            if own is not None and new is not None:
                own.copy_(new)


def _pass_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _called(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: that a module has one keeps torch's fast paths from going round it."""


def _if_implemented(ask: Callable[[], Found]) -> Found | None:
    try:
        return ask()
    except NotImplementedError:
        return None
