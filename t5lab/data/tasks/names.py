"""Names of our tasks, objectives and metrics: a typo is told before TensorFlow is imported."""

# of text_tasks.py; each learns from text alone
OBJECTIVES = ('span_corruption', 'iid_denoising', 'prefix_lm', 'lm', 'document_lm', 'ul2', 'mlm',
              'bert', 'gap_sentences', 'fill_in_the_middle')
# of evaluation/metrics.py, for files of one's own
METRICS = ('bleu', 'chrf', 'squad', 'trivia_qa', 'rouge', 'exact_match')

# The first parts of the names of tasks whose data the package carries.
EMBEDDED = ('books_', 'docs_', 'embedded_', 'g2p_', 'ha_', 'numpydoc_')

NAMES = tuple("""
  books_bert books_document_lm books_fill_in_the_middle books_gap_sentences books_iid_denoising
  books_lm books_mlm books_prefix_lm books_span_corruption books_ul2 c4_v220_full_lm
  c4_v220_iid_denoising c4_v220_prefix_lm c4_v220_span_corruption c4_v310_full_lm
  c4_v310_iid_denoising c4_v310_prefix_lm c4_v310_span_corruption closed_book_qa
  cnn_dailymail_v002 docs_match docs_summarize dpr_v001_simple embedded_supervised g2p_en_us
  gigaword glue_ax_v002 glue_cola_v002 glue_mnli_matched_v002 glue_mnli_mismatched_v002
  glue_mnli_v002 glue_mrpc_v002 glue_qnli_v002 glue_qqp_v002 glue_rte_v002 glue_sst2_v002
  glue_stsb_v002 glue_v002_proportional glue_wnli_v002 ha_ende ha_enes ha_enfr lm1b_lm mc4
  mc4.af mc4.am mc4.ar mc4.az mc4.be mc4.bg mc4.bg_Latn mc4.bn mc4.ca mc4.ceb mc4.co mc4.cs
  mc4.cy mc4.da mc4.de mc4.el mc4.el_Latn mc4.en mc4.eo mc4.es mc4.et mc4.eu mc4.fa mc4.fi
  mc4.fil mc4.fr mc4.fy mc4.ga mc4.gd mc4.gl mc4.gu mc4.ha mc4.haw mc4.hi mc4.hi_Latn mc4.hmn
  mc4.ht mc4.hu mc4.hy mc4.id mc4.ig mc4.is mc4.it mc4.iw mc4.ja mc4.ja_Latn mc4.jv mc4.ka
  mc4.kk mc4.km mc4.kn mc4.ko mc4.ku mc4.ky mc4.la mc4.lb mc4.lo mc4.lt mc4.lv mc4.mg mc4.mi
  mc4.mk mc4.ml mc4.mn mc4.mr mc4.ms mc4.mt mc4.my mc4.ne mc4.nl mc4.no mc4.ny mc4.pa mc4.pl
  mc4.ps mc4.pt mc4.ro mc4.ru mc4.ru_Latn mc4.sd mc4.si mc4.sk mc4.sl mc4.sm mc4.sn mc4.so
  mc4.sq mc4.sr mc4.st mc4.su mc4.sv mc4.sw mc4.ta mc4.te mc4.tg mc4.th mc4.tr mc4.uk mc4.ur
  mc4.uz mc4.vi mc4.xh mc4.yi mc4.yo mc4.zh mc4.zh_Latn mc4.zu natural_questions_open
  numpydoc_qa squad_v010_allanswers squad_v010_context_free squad_v2 super_glue_axb_v102
  super_glue_axg_v102 super_glue_boolq_v102 super_glue_cb_v102 super_glue_copa_v102
  super_glue_multirc_v102 super_glue_record_v102 super_glue_rte_v102
  super_glue_v102_proportional super_glue_wic_v102 super_glue_wsc_v102_simple_eval
  super_glue_wsc_v102_simple_train t5_multitask_11b t5_multitask_3b t5_multitask_base
  t5_multitask_large t5_multitask_small trivia_qa_open web_questions_open
  wikipedia_20230601.en_iid_denoising wikipedia_20230601.en_lm wikipedia_20230601.en_prefix_lm
  wikipedia_20230601.en_span_corruption wikitext_103_lm wikitext_2_lm wmt14_deen_v003
  wmt14_ende_v003 wmt14_enfr_v003 wmt14_fren_v003 wmt15_enfr_v003 wmt15_fren_v003
  wmt16_enro_v003 wmt16_roen_v003 wmt19_csen_v003 wmt19_deen_v003 wmt19_defr_v003
  wmt19_encs_v003 wmt19_ende_v003 wmt19_enfi_v003 wmt19_engu_v003 wmt19_enkk_v003
  wmt19_enlt_v003 wmt19_enru_v003 wmt19_enzh_v003 wmt19_fien_v003 wmt19_frde_v003
  wmt19_guen_v003 wmt19_kken_v003 wmt19_lten_v003 wmt19_ruen_v003 wmt19_zhen_v003
  wmt_t2t_deen_v003 wmt_t2t_ende_v003 xsum
""".split())
